"""The benchmark suite: `make bench` runs it and brings the results and README up to date."""
