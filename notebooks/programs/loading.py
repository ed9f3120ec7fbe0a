"""What other processes need in lesson 06, and published figures of loader workers.

It imports torch only where it is used, so that a process that only decodes files starts quickly.
"""

import pickle

import cloudpickle

# Speedup over no workers. NERSC trains a vision transformer on weather data: 8.8, 12.5 and 10.7
# samples/s. In S. Bekman's benchmark, loading and training only sleep. It publishes the seconds of
# an epoch without the 2 s of training (10 batches of 0.2 s); they are added here.
SLEEPING = {0: 5.39, 1: 3.90, 2: 1.33, 3: 0.84, 4: 0.88}
PUBLISHED = {
    "published: A100, NERSC/sc24-dl-tutorial": {0: 1.0, 4: 12.5 / 8.8, 16: 10.7 / 8.8},
    "published: simulated by sleeping, stas00/ml-engineering": {
        workers: (SLEEPING[0] + 2) / (seconds + 2) for workers, seconds in SLEEPING.items()
    },
}


class ByValue:
    """Wraps a function or a data set of a notebook, and sends its code to another process."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):  # what a pickle of this object contains
        return restore, (cloudpickle.dumps(self.value),)

    def __call__(self, *arguments):
        return self.value(*arguments)

    def __len__(self):
        return len(self.value)

    def __getitem__(self, index):
        return self.value[index]


def restore(code):
    """Build the object again in the other process."""
    return ByValue(pickle.loads(code))


def collate_floats(samples):
    """Crop, mirror and normalize each image by itself: float32 (N, 3, 64, 64) and the labels.

    A sample is (uint8 array (72, 72, 3), label).
    """
    import torch

    images = []
    for pixels, _ in samples:
        top, left = torch.randint(9, (2,)).tolist()
        crop = torch.from_numpy(pixels[top : top + 64, left : left + 64]).permute(2, 0, 1)
        if torch.rand(()) < 0.5:
            crop = crop.flip(2)
        images.append((crop.float() / 255 - 0.5) / 0.25)
    return torch.stack(images), torch.tensor([label for _, label in samples])
