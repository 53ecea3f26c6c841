"""Model families, one file each. Discovery finds every module here whose name has no underscore in front."""
