"""Sources of an update's tokens: episodes of student, teacher, expert or players."""
