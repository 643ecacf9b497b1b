"""Finished models at work: the engines that compute logits, the predictor, prediction over many images."""
