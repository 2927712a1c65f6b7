/* Lines for the test, by the serial port, whatever the storm has left in its registers. */
#include "devices.h"

void say(const char *text)
{
	out8(0x3fb, 3);	/* no divisor */
	out8(0x3fc, 0);	/* no loop-back */
	out8(0x3f9, 0);
	while (*text)
		out8(0x3f8, *text++);
}

void say_number(const char *name, u64 value)
{
	char digits[24];
	u32 place = sizeof(digits);

	digits[--place] = 0;
	do
		digits[--place] = '0' + value % 10;
	while (value /= 10);
	say(" ");
	say(name);
	say("=");
	say(digits + place);
}
