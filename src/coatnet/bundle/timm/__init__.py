"""timm's pretrained CoAtNets: their catalog, their tensor names, and the folders that timm reads and writes."""
