"""Behind the command line: targets, tables, time lines, a worker as a process."""
