"""ALFWorld on its own engine; needs the extra `alfworld`."""
