"""K batches, from wherever they come: arrays, minibatches drawn on the device, streams."""

from hypergrad.data.batches import Minibatches
from hypergrad.data.splits import Splits
