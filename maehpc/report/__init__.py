"""Reports over experiments: statistics, tables, figures and one HTML page, from what stages left on disk.

OUT/index.html                            everything below on one page
OUT/table.{csv,parquet,md,tex}            one row an experiment, data set and method
OUT/adversarial.{csv,parquet,md,tex}      one row an experiment, data set, method and kind of search
OUT/metrics.{csv,parquet,md,tex}          one row an experiment, data set, method, metric and part
OUT/scores.{csv,parquet,md,tex}           one row an experiment, data set, classifier and split
OUT/images.parquet                        one row an image and method
OUT/image_metrics.parquet                 one row an image, method, metric and part
OUT/sensitivity.{png,pdf}                 distributions of max sensitivity to random perturbations
OUT/adversarial.{png,pdf}                 random maximum beside what PGD found
OUT/panels-EXPERIMENT-DATASET.{png,pdf}   and curves-…, reconstructions-…

What was not measured has no table and no figure; those of sensitivity and scores are always there.
"""

from maehpc.report.aggregate import Summary, aggregate

__all__ = ["Summary", "aggregate"]
