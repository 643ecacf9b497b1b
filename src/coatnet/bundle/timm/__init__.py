"""timm's pretrained CoAtNets: which there are, their folders and files, and which tensor is which of ours."""
