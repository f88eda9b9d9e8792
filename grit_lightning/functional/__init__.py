"""Pure tensor maths of the method: no Lightning, no PEFT, no input or output."""
