"""What a pass will take before it is made: the package's own code, run on shapes."""
