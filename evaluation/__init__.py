"""Behind eval_rm.py and the report at the end of a training: scores, metrics, analysis, report."""
