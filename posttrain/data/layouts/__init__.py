"""The layouts of image data sets, a reader each. Every reader yields a record or a problem for each row."""
