/* What the two vCPUs share: the devices found at the windows, and what was done with them. */
#pragma once
#include "machine.h"

#define MAX_DEVICES 16
#define MAX_QUEUES 3

enum {
	ID_NET = 1, ID_BLOCK = 2, ID_ENTROPY = 4, ID_BALLOON = 5,
	ID_SOCKET = 19, ID_FS = 26, ID_PMEM = 27,
};

enum {	/* registers, virtio 1.2 section 4.2.2 */
	DEVICE_ID = 0x008, DEVICE_FEATURES = 0x010, DEVICE_FEATURES_SELECT = 0x014,
	DRIVER_FEATURES = 0x020, DRIVER_FEATURES_SELECT = 0x024, QUEUE_SELECT = 0x030,
	QUEUE_SIZE_MAX = 0x034, QUEUE_SIZE = 0x038, QUEUE_READY = 0x044, QUEUE_NOTIFY = 0x050,
	INTERRUPT_STATUS = 0x060, INTERRUPT_ACK = 0x064, STATUS = 0x070,
	QUEUE_DESCRIPTOR = 0x080, QUEUE_DRIVER = 0x090, QUEUE_DEVICE = 0x0a0, CONFIG = 0x100,
};

#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define NEEDS_RESET 0x40
#define F_INDIRECT (1ul << 28)
#define F_VERSION_1 (1ul << 32)

#define LINK_NEXT 1
#define LINK_WRITE 2
#define LINK_INDIRECT 4

struct descriptor {
	u64 gpa;
	u32 length;
	u16 flags;
	u16 next;
};

/* One queue's rings, at the arena of its number. */
struct queue {
	u64 arena;
	u32 size;	/* 0: not set up */
	u32 descriptors;	/* given out so far; the next one is this modulo `size` */
	u16 available;	/* index, as we publish it */
	u16 used;	/* index of the device, as last seen */
};

struct device {
	u64 window;
	u32 id;
	u32 queue_count;
	u64 features;
	int running;
	u64 config;	/* its first 8 bytes */
	struct queue queues[MAX_QUEUES];
	u64 completed, stopped, started;
};

extern struct device devices[MAX_DEVICES];
extern u32 device_count;
extern volatile u32 found_devices;	/* all of them, so the second vCPU may begin */
extern struct device *balloon;
extern volatile u32 order;	/* from the test, see storm.c */
extern volatile u32 second_may_notify, second_obeys, second_rounds;

static inline struct descriptor *table(struct queue *queue)
{
	return (struct descriptor *)queue->arena;
}

static inline u64 driver_ring(struct queue *queue)
{
	return queue->arena + 0x4000;
}

static inline u64 device_ring(struct queue *queue)
{
	return queue->arena + 0x6000;
}

static inline u64 indirect_table(struct queue *queue, u32 number)
{
	return queue->arena + 0xa000 + 0x1000 * (number & 15);
}

/* values.c */
u64 some_number(struct random *random);
u64 some_gpa(struct random *random);
u64 some_buffer(struct random *random, u64 *length);
struct descriptor some_descriptor(struct random *random, u32 size);

/* registers.c */
void random_registers(struct random *random);
void random_ports(struct random *random);
void odd_accesses(struct random *random);

/* drivers.c */
void find_devices(void);
void bring_up(struct device *device, struct random *random);
void look_after(struct device *device);
void notify(struct device *device, u32 queue);

/* rings.c */
void offer(struct device *device, u32 number, struct random *random);

/* requests.c */
u32 request(struct device *device, u32 number, struct descriptor *pieces, struct random *random);
#define MAX_PIECES 64

/* console.c */
void say(const char *text);
void say_number(const char *name, u64 value);
