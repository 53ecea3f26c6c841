"""Model families, one file each; every module here is found by discovery."""
