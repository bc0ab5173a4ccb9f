/* What the parts of the fast path share; _fastpath.c says what it is. */

#ifndef RELAYMUX_FASTPATH_H
#define RELAYMUX_FASTPATH_H

#include "_native.h"

#include <stdint.h>

/* Frames (docs/protocol.md, 3). */
#define HEADER 12
#define OFFSET 8
#define ACK_FRAME (HEADER + OFFSET)
#define CREDIT_FRAME (HEADER + 2 * OFFSET)

/* Kinds of frames (docs/protocol.md, 3). */
enum { ACK = 0x06, DATA = 0x13, CREDIT = 0x14 };

/* Free space wanted for a read, as in relaymux/net/receiving.py. */
#define READ_ROOM (64 * 1024)

/* The most that is read at once: with a header and an ACK in front, no more pieces than a write may have. */
#define MOST_TURN ((MOST_PIECES - 4) * READ_ROOM)

/* A read that brings so much is followed by another one, likewise. */
#define READ_AGAIN (16 * 1024)

/* Frames that are not acknowledged, and streams.  With more of them it is Python's turn. */
#define MOST_SENT 64
#define MOST_STREAMS 64

/* Pipes in which pages wait to be acknowledged. */
#define STORES 4

/* What a frame begins with: an ACK, and its header.  There is room for twice as many as are not acknowledged. */
#define HEAD (ACK_FRAME + HEADER)
#define HEADS (2 * MOST_SENT)

typedef struct {
    int read, write, is_open;
} Pipe;

/* What passes pages on; nothing is in it between two leases. */
typedef struct {
    PyObject_HEAD
    int is_lent; /* a lease has it that is not settled */
    int was_full; /* the last lease had to copy some of what had arrived */
    Pipe out, in;
    Pipe store[STORES]; /* used in turn, from `first` to `last` */
    Py_ssize_t stored[STORES];
    int first, last;
    int nowhere; /* /dev/null */
    unsigned char *heads; /* what frames begin with, in pages of their own */
    int next_head;
} Pages;

/* A sequenced frame that was sent and not acknowledged. */
typedef struct {
    uint64_t end; /* in the numbering of sequenced bytes */
    int head_length;
    unsigned char head[CREDIT_FRAME];
    Pieces payload; /* or, where pages are passed on: */
    Py_ssize_t stored;  /* bytes of it in the stores, and */
    Py_ssize_t useless; /* those before them: its head, and what another store had room for of it */
} Sent;

typedef struct {
    uint32_t id;
    int fd;
    int reads, writes; /* whether its socket is read, and written, here */
    uint32_t others;   /* what else Python's reactor waits for there */
    int held;          /* not watched, as there is no credit */
    /* What its socket gave: docs/protocol.md, 4.3 and 5. */
    uint64_t sent, limit, delivered, sent_before;
    /* What its socket took, and the credit for it. */
    uint64_t received, consumed, granted, size, step, received_before, consumed_before;
    int credit_due;
    /* How its socket has ended for reading (-1 or an error), and for writing (an error). */
    int read_end, write_end;
    Pieces untaken; /* payload that its socket is to take, or does not */
} Stream;

typedef struct {
    PyObject_HEAD
    Pool *pool;
    int fd, epoll;
    int over;    /* it is Python's turn */
    int settled; /* Python has taken it back */
    /* Of a link with TLS; else NULL. */
    Records *sealer, *opener;
    Pool *ciphers; /* where what is encrypted goes */
    PyObject *wrong_tag;
    int hole; /* something was left out of what was to be encrypted, or decrypted */
    Odd odd;
    PyObject *unread; /* a list: what has arrived behind an odd record */
    /* Of a link whose pages are passed on; else NULL. */
    Pages *pages;
    int sends_pages;        /* to the link, too */
    Py_ssize_t leaving;     /* bytes of `out` that follow `unsent` */
    Py_ssize_t forgotten;   /* bytes that need not be stored any longer */
    int lost;               /* something that was taken is gone: it cannot be settled */
    int gets_data;          /* DATA has arrived */
    Py_ssize_t whole;       /* bytes of `in` of frames that are complete, and the stream's whose they are; */
    Stream *whole_stream;   /* they follow what is in its `untaken` */
    Py_ssize_t arriving;    /* bytes of `in` behind them, of the frame that arrives; they follow `payload` */
    unsigned char few[2 * OFFSET]; /* the payload of an ACK or CREDIT that arrives */
    /* What is sent. */
    uint64_t end, acknowledged, settled_end;
    int64_t room; /* of the replay buffer; negative with control frames beyond it */
    uint64_t most_held; /* bytes in it with which control frames have to wait, too */
    uint64_t *ends; /* of the frames that were sent before, oldest first */
    Py_ssize_t first_end, end_count; /* those that are not acknowledged */
    Py_ssize_t frame_cost, local_turn, link_turn;
    Sent *sent; /* a ring of MOST_SENT */
    int first, sent_count;
    int blocked; /* the link takes nothing more; `unsent` is what is left of a write */
    Pieces unsent; /* as its socket takes it: encrypted, where the link is */
    unsigned char lead[HEAD]; /* what `unsent` may have before a payload; and of CREDITs: */
    unsigned char credits[CREDIT_FRAME * MOST_STREAMS + ACK_FRAME];
    int write_end;
    /* What is received. */
    uint64_t rx_next, rx_acknowledged, ack_bytes;
    uint64_t rx_reminded; /* of which the peer knew when it was time to look whether an ACK is late */
    uint32_t max_payload;
    unsigned char header[HEADER];
    int header_length, kind;
    Stream *stream; /* of the DATA or CREDIT frame that is arriving */
    Py_ssize_t missing;
    Pieces payload;
    PyObject *left; /* a list: what is not understood, and all behind it */
    int read_end;
    uint64_t carried;
    int stream_count, places;
    Stream *streams;
    int waits;         /* wait() has it, and not feed() */
    Stream *full;      /* its only one, if the socket takes nothing more; the link is not read until it does, */
    double full_until; /* or until this time, by CLOCK_MONOTONIC; 0: see end_full() */
} Lease;

extern PyTypeObject LeaseType; /* _fastpath_lease.c */
extern PyTypeObject PagesType; /* _fastpath_pipes.c */

/* An exception that waits, or none: what is called meanwhile may have its own. */
typedef struct {
    PyObject *type, *value, *traceback;
} Error;

/* _fastpath_send.c */
Error keep_error(void);
int raise_again(Error error, int failed);
void watch_link(const Lease *lease);
void watch_local(const Lease *lease, const Stream *stream);
int lacks_credit(const Stream *stream);
void release(Lease *lease, Stream *stream);
void push(Lease *lease);
Sent *keep_data(Lease *lease, Stream *stream, Py_ssize_t length);
Py_ssize_t lead_length(const Lease *lease);
void lead(Lease *lease, const Stream *stream, Py_ssize_t length, unsigned char *at);
int from_local(Lease *lease, Stream *stream);
int go_on(Lease *lease);
int say_late_ack(Lease *lease);
int link_takes(Lease *lease);
int local_takes(Lease *lease);

/* _fastpath_receive.c */
int begin_frame(Lease *lease);
int end_frame(Lease *lease);
int give_up_frame(Lease *lease);
int take_in(Lease *lease, const Piece *piece);
Py_ssize_t take_pieces(Lease *lease, Py_ssize_t limit, Py_ssize_t again, int *lost);
void deliver(Lease *lease, Stream *stream);
void deliver_all(Lease *lease);
int from_link(Lease *lease);

/* _fastpath_pages.c */
int send_pages(Lease *lease, Stream *stream, Py_ssize_t most, unsigned char *head);
int take_pages(Lease *lease, int *lost);

/* _fastpath_pipes.c */
Py_ssize_t pages_take(int fd, const Pipe *pipe, Py_ssize_t limit, int *ended);
Py_ssize_t pages_put(int fd, const Pipe *pipe, Py_ssize_t length, int *error);
int pages_can_store(const Pages *pages);
Py_ssize_t pages_store(Pages *pages, Py_ssize_t length);
int pages_open(Pages *pages);
unsigned char *pages_begin(Pages *pages, Py_ssize_t size);
void pages_led(Pages *pages);
int pages_drop(const Pages *pages, const Pipe *pipe, Py_ssize_t *length);
int pages_copy(const Pipe *pipe, Py_ssize_t *length, Output *output);
int pages_unstore(Pages *pages, Py_ssize_t *length, Output *output);

#endif
