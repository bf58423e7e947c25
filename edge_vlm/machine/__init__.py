"""What this computer gives: settings, hardware, memory, folders, files that last."""
