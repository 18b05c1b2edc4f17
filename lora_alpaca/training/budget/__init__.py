"""A run within its budget of time or money: `countdown` tells what is left, `pacing` the steps and rates that fit."""
