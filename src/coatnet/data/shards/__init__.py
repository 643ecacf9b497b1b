"""Images in tar files with an index: `pack` writes them, `open` opens them, from a folder or behind a URL.

`index` is the format of the index, `dataset` reads images by it, `webdataset` makes one for the tars of other programs,
`storage` reads files from a folder, or from a URL by blocks that it keeps on the disk; `pack` writes the shards.
"""
