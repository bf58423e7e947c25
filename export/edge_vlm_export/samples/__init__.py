"""Pictures and conversations to calibrate and measure with."""
