"""Classification inside the tools that people already run, scikit-learn, Ray Data and Spark: an extra each."""
