"""The images: data sets, photographs as files, and the loader that divides batches among ranks."""

from cnnlab.data.datasets import cifar10 as cifar10
from cnnlab.data.datasets import digits as digits
from cnnlab.data.datasets import fashion_mnist as fashion_mnist
from cnnlab.data.datasets import load as load
from cnnlab.data.datasets import synthetic as synthetic
from cnnlab.data.loader import train_loader as train_loader
from cnnlab.data.photos import PhotoDataset as PhotoDataset
from cnnlab.data.photos import photo_folder as photo_folder
