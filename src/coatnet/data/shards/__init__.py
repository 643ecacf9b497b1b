"""Images in tar files with a side index: packed, found, read from here or elsewhere, in a shuffled order."""
