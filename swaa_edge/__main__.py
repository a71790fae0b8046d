"""Run the command line without the `swaa-edge` script: python -m swaa_edge --help"""

from swaa_edge.cli import main

if __name__ == "__main__":
    main()
