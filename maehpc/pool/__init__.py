"""Shards of many stores dealt to many workers, of which any may die at any instant.

`schedule` decides, `drive` turns the wheel, a crew computes: on Ray, or simulated (`maehpc bench pool --simulate`).
"""

from maehpc.pool.drive import Crew, Done, Ended, Event, Failed, Joined, Left, Returned, drive
from maehpc.pool.schedule import Schedule, Shard, Work

__all__ = [
    "Crew",
    "Done",
    "Ended",
    "Event",
    "Failed",
    "Joined",
    "Left",
    "Returned",
    "Schedule",
    "Shard",
    "Work",
    "drive",
]
