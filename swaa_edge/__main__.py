"""Runs the command line where no `swaa-edge` script is on the path: python -m swaa_edge --help"""

from swaa_edge.cli import main

if __name__ == "__main__":
    main()
