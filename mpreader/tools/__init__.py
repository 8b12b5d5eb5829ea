"""Work of the commands: downloads, benchmarks, the doctor, the demo. The command line calls it, the library never."""
