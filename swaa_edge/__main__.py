"""Run the command line where the `swaa-edge` script is not on the path: python -m swaa_edge --help"""

from swaa_edge.cli import main

if __name__ == "__main__":
    main()
