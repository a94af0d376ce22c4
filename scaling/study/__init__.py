"""Many runs: sweep, launchers, results, laws, charts, report. Reads and writes files only."""
