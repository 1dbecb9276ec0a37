"""Reports over experiments: statistics, tables, figures and one HTML page, from what stages left on disk.

OUT/index.html                            everything below on one page
OUT/table.{csv,parquet,md,tex}            one row an experiment, data set and method
OUT/scores.{csv,parquet,md,tex}           one row an experiment, data set and split
OUT/images.parquet                        one row an image and method
OUT/sensitivity.{png,pdf}                 distributions of max sensitivity
OUT/panels-EXPERIMENT-DATASET.{png,pdf}   and curves-…, reconstructions-…
"""

from maehpc.report.aggregate import Summary, aggregate

__all__ = ["Summary", "aggregate"]
