"""Sampling: encodes prompts and samples latents and images from a policy."""
