"""A reward that runs in any process: how bright an image is."""


def score(images, prompts, metadata):
    return images.mean((1, 2, 3))
