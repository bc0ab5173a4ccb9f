/* The fast path's way out: from local sockets, and what is to be said of what has arrived, to the link. */

#include "_fastpath.h"

#include <endian.h>
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>

/* An ACK rides along from this share of what is worth one, as in relaymux/core/outbox.py. */
#define ACK_RIDE_SHARE 4

static void watch(const Lease *lease, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    epoll_ctl(lease->epoll, EPOLL_CTL_MOD, fd, &event);
}

void watch_link(const Lease *lease)
{
    watch(lease, lease->fd, (lease->full ? 0 : EPOLLIN) | (lease->blocked ? EPOLLOUT : 0));
}

void watch_local(const Lease *lease, const Stream *stream)
{
    uint32_t full = stream == lease->full ? EPOLLOUT : 0;
    watch(lease, stream->fd, (stream->held ? 0 : EPOLLIN) | stream->others | full);
}

static void put64(unsigned char *at, uint64_t value)
{
    value = htobe64(value);
    memcpy(at, &value, sizeof value);
}

static void put_header(unsigned char *at, int kind, uint32_t id, uint32_t length)
{
    memset(at, 0, HEADER);
    at[0] = kind;
    id = htobe32(id);
    memcpy(at + 4, &id, sizeof id);
    length = htobe32(length);
    memcpy(at + 8, &length, sizeof length);
}

/* A place for one more frame, kept until it is acknowledged; the caller has looked whether there is one. */
static Sent *keep(Lease *lease, Py_ssize_t length)
{
    Sent *sent = &lease->sent[(lease->first + lease->sent_count++) % MOST_SENT];
    lease->end += length;
    lease->room -= length + lease->frame_cost;
    sent->end = lease->end;
    sent->payload.count = 0;
    sent->payload.length = 0;
    sent->stored = sent->useless = 0;
    return sent;
}

Error keep_error(void)
{
    Error error;
    PyErr_Fetch(&error.type, &error.value, &error.traceback);
    return error;
}

/* -1 with an exception: the one of what has `failed` meanwhile, or else `error`; 0 if there is none. */
int raise_again(Error error, int failed)
{
    if (!failed) {
        PyErr_Restore(error.type, error.value, error.traceback);
        return error.type ? -1 : 0;
    }
    Py_XDECREF(error.type);
    Py_XDECREF(error.value);
    Py_XDECREF(error.traceback);
    return -1;
}

/* Write what is in `unsent`, and pages; what the link does not take waits until it does. */
void push(Lease *lease)
{
    if (lease->unsent.count)
        put(lease->fd, &lease->unsent, &lease->write_end);
    if (lease->leaving && !lease->unsent.count && !lease->write_end)
        lease->leaving -= pages_put(lease->fd, &lease->pages->out, lease->leaving, &lease->write_end);
    int blocked = lease->unsent.count || lease->leaving;
    if (lease->write_end) {
        lease->over = 1;
    } else if (blocked != lease->blocked) {
        lease->blocked = blocked;
        watch_link(lease);
    }
}

/*
 * Have frames written, and encrypted before where the link is, if it was not blocked.  -1 with an exception: it
 * can say nothing more.
 */
static int say(Lease *lease, Pieces *frames)
{
    int failed = 0;
    if (lease->sealer) {
        Output output = {.pool = lease->ciphers, .pieces = &lease->unsent};
        failed = seal(lease->sealer, frames, APPLICATION_DATA, &output);
        drop(frames);
    } else {
        lease->unsent = *frames;
    }
    if (failed) {
        /* What follows must not be taken for what follows the frames before: the next connection repeats these. */
        drop(&lease->unsent);
        lease->hole = 1;
        lease->write_end = EIO;
        lease->over = 1;
        return -1;
    }
    push(lease);
    return 0;
}

/* An ACK, at `at`.  Returns its length. */
static int put_ack(Lease *lease, unsigned char *at)
{
    put_header(at, ACK, 0, OFFSET);
    put64(at + HEADER, lease->rx_next);
    lease->rx_acknowledged = lease->rx_next;
    return ACK_FRAME;
}

/*
 * Say what is due: CREDIT, and ACK, which rides along where that is worthwhile.  See Link.data_to_send.  -1 with
 * an exception.
 */
static int answer(Lease *lease)
{
    if (lease->blocked)
        return 0;
    unsigned char *at = lease->credits;
    int due = 0;
    for (int i = 0; i < lease->stream_count; i++)
        due += lease->streams[i].credit_due;
    uint64_t new_bytes = lease->rx_next - lease->rx_acknowledged;
    if (new_bytes >= (due ? lease->ack_bytes / ACK_RIDE_SHARE : lease->ack_bytes))
        at += put_ack(lease, at);
    for (int i = 0; due && i < lease->stream_count; i++) {
        Stream *stream = &lease->streams[i];
        if (!stream->credit_due)
            continue;
        if (lease->sent_count == MOST_SENT || lease->end - lease->acknowledged >= lease->most_held) {
            lease->over = 1; /* the rest is said by Python */
            break;
        }
        Sent *sent = keep(lease, CREDIT_FRAME);
        stream->credit_due = 0;
        stream->granted = stream->consumed + stream->size;
        sent->head_length = CREDIT_FRAME;
        put_header(sent->head, CREDIT, stream->id, 2 * OFFSET);
        put64(sent->head + HEADER, stream->granted);
        put64(sent->head + HEADER + OFFSET, stream->consumed);
        memcpy(at, sent->head, CREDIT_FRAME);
        at += CREDIT_FRAME;
    }
    Pieces frames = {.count = 0};
    append(&frames, NULL, (char *)lease->credits, at - lease->credits);
    return frames.count ? say(lease, &frames) : 0;
}

/* Whether its socket has something to send that there is no credit for. */
int lacks_credit(const Stream *stream)
{
    return stream->held && stream->sent == stream->limit;
}

/* Do not look at a socket for which there is no credit. */
static void hold(Lease *lease, Stream *stream)
{
    stream->held = 1;
    watch_local(lease, stream);
}

void release(Lease *lease, Stream *stream)
{
    stream->held = 0;
    watch_local(lease, stream);
}

/* A frame of `length` bytes that a local socket gave. */
Sent *keep_data(Lease *lease, Stream *stream, Py_ssize_t length)
{
    Sent *sent = keep(lease, HEADER + length);
    sent->head_length = HEADER;
    put_header(sent->head, DATA, stream->id, length);
    stream->sent += length;
    lease->carried += length;
    return sent;
}

static int ack_rides(const Lease *lease)
{
    return lease->rx_next - lease->rx_acknowledged >= lease->ack_bytes / ACK_RIDE_SHARE;
}

/* Bytes that leave before a payload. */
Py_ssize_t lead_length(const Lease *lease)
{
    return (ack_rides(lease) ? ACK_FRAME : 0) + HEADER;
}

/* Write these: an ACK if one is worthwhile, and the header of what a local socket gave. */
void lead(Lease *lease, const Stream *stream, Py_ssize_t length, unsigned char *at)
{
    if (ack_rides(lease))
        at += put_ack(lease, at);
    put_header(at, DATA, stream->id, length);
}

/* Send up to `most` bytes of a local socket, in memory.  -1 with an exception. */
static int send_pieces(Lease *lease, Stream *stream, Py_ssize_t most)
{
    Pieces pieces = {.count = 0}, frames = {.count = 0};
    Output output = {.pool = lease->pool, .pieces = &pieces};
    int failed = gather(&output, stream->fd, most, READ_ROOM, READ_AGAIN, &stream->read_end) < 0;
    if (failed || stream->read_end)
        lease->over = 1;
    if (!pieces.count)
        return failed ? -1 : 0;
    append(&frames, NULL, (char *)lease->lead, lead_length(lease));
    lead(lease, stream, pieces.length, lease->lead);
    for (int i = 0; i < pieces.count; i++)
        append(&frames, pieces.piece[i].owner, pieces.piece[i].memory, pieces.piece[i].length);
    keep_data(lease, stream, pieces.length)->payload = pieces;
    Error error = keep_error();
    return raise_again(error, say(lease, &frames));
}

/* A local socket has something.  -1 with an exception. */
int from_local(Lease *lease, Stream *stream)
{
    if (lease->blocked || stream->sent == stream->limit) {
        hold(lease, stream);
        if (stream == lease->full && lacks_credit(stream))
            lease->over = 1; /* the link is not read, which has to bring it */
        return 0;
    }
    int64_t most = lease->local_turn;
    if (lease->room - HEADER - lease->frame_cost < most)
        most = lease->room - HEADER - lease->frame_cost;
    if (most <= 0 || lease->sent_count == MOST_SENT) {
        lease->over = 1;
        return 0;
    }
    if ((uint64_t)most > stream->limit - stream->sent)
        most = stream->limit - stream->sent;
    unsigned char *head = NULL;
    if (lease->sends_pages && pages_can_store(lease->pages))
        head = pages_begin(lease->pages, lead_length(lease));
    return head ? send_pages(lease, stream, most, head) : send_pieces(lease, stream, most);
}

/* Say what is due, and have those watched again who may send.  -1 with an exception. */
int go_on(Lease *lease)
{
    if (answer(lease))
        return -1;
    for (int i = 0; i < lease->stream_count && !lease->blocked; i++)
        if (lease->streams[i].held && lease->streams[i].sent < lease->streams[i].limit)
            release(lease, &lease->streams[i]);
    return 0;
}

/*
 * To be called now and then: say ACK if the one for what had arrived when it was called last was not worthwhile
 * until now.  -1 with an exception.
 */
int say_late_ack(Lease *lease)
{
    int is_late = lease->rx_next > lease->rx_acknowledged && lease->rx_acknowledged == lease->rx_reminded;
    lease->rx_reminded = lease->rx_acknowledged;
    if (!is_late || lease->blocked || lease->over)
        return 0;
    Pieces frames = {.count = 0};
    append(&frames, NULL, (char *)lease->lead, put_ack(lease, lease->lead));
    return say(lease, &frames);
}

/* The link takes something again.  -1 with an exception. */
int link_takes(Lease *lease)
{
    push(lease);
    return go_on(lease);
}

/* A local socket that was full takes something again.  -1 with an exception. */
int local_takes(Lease *lease)
{
    deliver(lease, lease->full);
    return go_on(lease);
}
