"""What any program needs and the method does not: files, folders, flags, devices, a solver."""
