"""The HTTP server that scores images, and its wire format."""
