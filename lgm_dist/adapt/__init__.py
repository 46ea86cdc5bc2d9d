"""From photos to a classifier: a trained learner, and the file that holds one."""
