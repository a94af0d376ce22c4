"""Many runs: sweep, launch, results, laws, charts, report. Reads and writes files only."""
