"""What any program needs and the method does not: files, folders, flags, a solver. Import it before torch."""

import os

# Of torch's threads (GNU OpenMP's) one that waits for another gives way soon. By default it is 300 times as
# patient, and a run took 20 times as long where other work filled the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
