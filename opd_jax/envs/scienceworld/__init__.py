"""ScienceWorld on its own engine; needs the extra `scienceworld` and Java."""
