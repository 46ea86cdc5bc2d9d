"""What scripts/chaos.py does to trainings, and what it finds afterwards."""
