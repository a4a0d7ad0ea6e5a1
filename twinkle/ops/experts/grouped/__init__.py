"""Products of groups of rows with a matrix a group, for devices and dtypes for which torch has none."""
