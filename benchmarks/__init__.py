"""The benchmark suite: `make bench` runs it and brings the results, README and docs/ up to date."""
