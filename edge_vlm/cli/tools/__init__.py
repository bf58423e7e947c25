"""Commands about the machine: plan, bench, tune, doctor, completion."""
