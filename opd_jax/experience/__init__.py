"""Where an update's tokens come from: the student, the teacher, the expert, or players."""
