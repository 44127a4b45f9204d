"""`python -m maskops bench compile`: what can be known of the device kernels without a device.

`triton_compiler` and `cuda_compiler` compile, `sass` reads what came out, `budgets` says what must not be in it and
names what may stay for a reason, `workers` spreads the work over processes, `report` shows it. `command` puts them
together.
"""
