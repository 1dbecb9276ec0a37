"""Explanations on disk: one Zarr v3 group a data set, and the ledger that says which of it may be trusted.

MAPS/DATASET.zarr/
  zarr.json                   the group: what was explained, and how
  image/{zarr.json, c.0}      coordinate: the images' indices
  score/{zarr.json, c.0}      coordinate: the names of the scores' columns
  scores/zarr.json            the table of scores, a row an image
  scores/c.3.0                shard 3 of it
  METHOD/zarr.json            one method's maps: dimension names, codecs
  METHOD/c.3.0.0              shard 3 of them
LEDGER/DATASET/
  store.json                  what the store is made from, and the bytes of every file above but the shards
  shard-00003.json            written last: shard 3 is whole, and these are its bytes

A process may die at any instant: what has no record does not exist, and what has one was on the disk before it.
"""

from maehpc.maps.layout import ArrayLayout, StoreLayout
from maehpc.maps.store import MapStore, Recorded
from maehpc.maps.table import unpacked
from maehpc.maps.verify import Problem, discard, verify

__all__ = ["ArrayLayout", "MapStore", "Problem", "Recorded", "StoreLayout", "discard", "unpacked", "verify"]
