"""A CoAtNet among the estimators of scikit-learn: train it, then use its features for another classifier."""

import tempfile

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from coatnet.integrations.sklearn import CoAtNetClassifier, CoAtNetFeatures

digits = load_digits()
images, others, labels, truth = train_test_split(digits.images, digits.target, test_size=0.5, random_state=0)

classifier = CoAtNetClassifier("coatnet-femto-16", epochs=4, recipe={"num_workers": 0})
classifier.fit(images, labels)
print(f"trained on {len(images)} digits: {classifier.score(others, truth):.1%} of {len(others)} others are right")

with tempfile.TemporaryDirectory() as folder:
    features = CoAtNetFeatures(str(classifier.bundle_.save(f"{folder}/bundle")))
    pipeline = make_pipeline(features, LogisticRegression(max_iter=1000)).fit(images[:100], labels[:100])
    print(f"logistic regression on features of 100 digits: {pipeline.score(others, truth):.1%}")
