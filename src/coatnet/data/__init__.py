"""Data sets, from opening a source to batches of tensors.

`open` finds out what kind of source is meant; there is a file per kind (`builtin`, `folder`, `manifest`,
`hugging_face`, and the folder `shards`). Every source is a `Dataset`, in a pair of `Splits`. `decode`, `transforms`,
`augmentation` and `mixing` make tensors of images; `sampler` orders them and `loader` makes batches, in worker
processes if that is faster. `inspection` checks a source before training.
"""

from typing import TYPE_CHECKING

from coatnet.public_names import lazy_exports

if TYPE_CHECKING:
    from coatnet.data.datasets import ArrayDataset as ArrayDataset
    from coatnet.data.datasets import Dataset as Dataset
    from coatnet.data.datasets import FileDataset as FileDataset
    from coatnet.data.decode import BadImage as BadImage
    from coatnet.data.folder import open_images as open_images
    from coatnet.data.inspection import Inspection as Inspection
    from coatnet.data.inspection import inspect as inspect
    from coatnet.data.loader import BadImages as BadImages
    from coatnet.data.loader import evaluation_batches as evaluation_batches
    from coatnet.data.loader import training_batches as training_batches
    from coatnet.data.mixing import Mixing as Mixing
    from coatnet.data.mixing import mix as mix
    from coatnet.data.open import open_dataset as open_dataset
    from coatnet.data.shards.pack import Packed as Packed
    from coatnet.data.shards.pack import pack as pack
    from coatnet.data.splits import Splits as Splits
    from coatnet.data.transforms import Augmentation as Augmentation
    from coatnet.data.transforms import EvaluationTransform as EvaluationTransform
    from coatnet.data.transforms import Preprocessing as Preprocessing
    from coatnet.data.transforms import TrainingTransform as TrainingTransform

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ArrayDataset": "coatnet.data.datasets",
        "Augmentation": "coatnet.data.transforms",
        "BadImage": "coatnet.data.decode",
        "BadImages": "coatnet.data.loader",
        "Dataset": "coatnet.data.datasets",
        "EvaluationTransform": "coatnet.data.transforms",
        "FileDataset": "coatnet.data.datasets",
        "Inspection": "coatnet.data.inspection",
        "Mixing": "coatnet.data.mixing",
        "Packed": "coatnet.data.shards.pack",
        "Preprocessing": "coatnet.data.transforms",
        "Splits": "coatnet.data.splits",
        "TrainingTransform": "coatnet.data.transforms",
        "evaluation_batches": "coatnet.data.loader",
        "inspect": "coatnet.data.inspection",
        "mix": "coatnet.data.mixing",
        "open_dataset": "coatnet.data.open",
        "open_images": "coatnet.data.folder",
        "pack": "coatnet.data.shards.pack",
        "training_batches": "coatnet.data.loader",
    },
)
