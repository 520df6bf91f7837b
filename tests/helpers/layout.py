"""The order of the rooms."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "kronfisher"

# Floors of rooms, the ground first. A file imports from its own room and from rooms on lower floors.
FLOORS = [
    {"errors", "tables"},
    {"linalg", "distributed", "pages"},
    {"operators", "likelihoods"},
    {"fisher"},
    {"layers"},
    {"capture", "fits"},
    {"estimation"},
    {"optim", "laplace", "influence"},
    {"__init__"},
    {"experiments", "integrations"},
    {"__main__"},
]
FLOOR = {room: k for k, floor in enumerate(FLOORS) for room in floor}
