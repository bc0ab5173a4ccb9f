/* The fast path's way in: frames from the link, as docs/protocol.md has them, and their payload to local sockets. */

#include "_fastpath.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#define MAX_OFFSET INT64_MAX

static uint64_t get64(const unsigned char *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return be64toh(value);
}

static uint32_t get32(const unsigned char *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return be32toh(value);
}

/* Forget frames up to `offset`, which is the end of one of them.  -1: it is not. */
static int acknowledge(Lease *lease, uint64_t offset)
{
    if (offset == lease->acknowledged)
        return 0;
    if (offset < lease->acknowledged || offset > lease->end)
        return -1;
    Py_ssize_t before = lease->first_end;
    while (before < lease->end_count && lease->ends[before] < offset)
        before++;
    if (offset <= lease->settled_end) {
        if (before == lease->end_count || lease->ends[before] != offset)
            return -1;
        before++;
    } else {
        int last = 0;
        while (last < lease->sent_count && lease->sent[(lease->first + last) % MOST_SENT].end < offset)
            last++;
        if (lease->sent[(lease->first + last) % MOST_SENT].end != offset)
            return -1;
        for (; last >= 0; last--) {
            Sent *sent = &lease->sent[lease->first];
            drop(&sent->payload);
            lease->forgotten += sent->useless + sent->stored;
            lease->first = (lease->first + 1) % MOST_SENT;
            lease->sent_count--;
            lease->room += lease->frame_cost;
        }
    }
    lease->room += (before - lease->first_end) * lease->frame_cost;
    lease->first_end = before;
    lease->room += offset - lease->acknowledged;
    lease->acknowledged = offset;
    return 0;
}

static Stream *stream_of(Lease *lease, uint32_t id)
{
    for (int i = 0; i < lease->stream_count; i++)
        if (lease->streams[i].id == id)
            return &lease->streams[i];
    return NULL;
}

/* Whether the frame whose header has arrived is one of those that are for us. */
int begin_frame(Lease *lease)
{
    const unsigned char *header = lease->header;
    uint32_t id = get32(header + 4), length = get32(header + 8);
    if (header[1] || header[2] || header[3])
        return 0;
    lease->kind = header[0];
    lease->missing = length;
    if (lease->kind == ACK)
        return !id && length == OFFSET;
    Stream *stream = lease->stream = stream_of(lease, id);
    if (!stream)
        return 0;
    if (lease->kind == CREDIT)
        return stream->reads && length == 2 * OFFSET;
    lease->gets_data |= lease->kind == DATA;
    return lease->kind == DATA && stream->writes && length && length <= lease->max_payload &&
           length <= stream->granted - stream->received;
}

/* The payload of an ACK or CREDIT, which may be in pieces. */
static void copy_payload(const Lease *lease, unsigned char *to)
{
    for (int i = 0; i < lease->payload.count; i++) {
        memcpy(to, lease->payload.piece[i].memory, lease->payload.piece[i].length);
        to += lease->payload.piece[i].length;
    }
}

static int take_credit(Lease *lease, const unsigned char *payload)
{
    Stream *stream = lease->stream;
    uint64_t limit = get64(payload), delivered = get64(payload + OFFSET);
    if (limit < stream->limit || limit > MAX_OFFSET || delivered < stream->delivered ||
        delivered > stream->sent)
        return -1;
    stream->limit = limit;
    stream->delivered = delivered;
    return 0;
}

/*
 * A socket has not taken everything.  With one stream alone it is waited for, and the link not read meanwhile: its
 * program will soon go on, and what this lease leaves to Python is copied.  With others it is Python's turn, which
 * lets them go on; so it is if the program may be waiting itself, for credit that the link has to bring.
 */
static void fill_up(Lease *lease, Stream *stream)
{
    int can_wait = lease->waits && !lease->over && lease->stream_count == 1 && stream->reads &&
                   !stream->others && !stream->write_end && !lacks_credit(stream);
    if (!can_wait) {
        stream->writes = 0;
        lease->over = 1;
    } else if (!lease->full) {
        lease->full = stream;
        lease->full_until = 0;
        watch_link(lease);
        watch_local(lease, stream);
    }
}

/* A socket that was waited for has taken everything. */
static void drain_out(Lease *lease, Stream *stream)
{
    lease->full = NULL;
    watch_link(lease);
    watch_local(lease, stream);
}

/* Have the stream's socket take what has arrived for it. */
void deliver(Lease *lease, Stream *stream)
{
    Py_ssize_t pages = stream == lease->whole_stream ? lease->whole : 0;
    if (!stream->untaken.count && !pages)
        return;
    if (stream->untaken.count)
        stream->consumed += put(stream->fd, &stream->untaken, &stream->write_end);
    if (pages && !stream->untaken.count && !stream->write_end) {
        Py_ssize_t taken = pages_put(stream->fd, &lease->pages->in, pages, &stream->write_end);
        stream->consumed += taken;
        lease->whole -= taken;
        pages -= taken;
    }
    if (stream->untaken.count || pages)
        fill_up(lease, stream);
    else if (stream == lease->full)
        drain_out(lease, stream);
    stream->credit_due = stream->consumed + stream->size >= stream->granted + stream->step;
}

/*
 * Payload for a stream, which its socket takes at the end of the turn: each call wakes who reads there.
 * -1: it takes nothing more.
 */
static int take_data(Lease *lease, Stream *stream)
{
    if (stream->untaken.count + lease->payload.count > MOST_PIECES) {
        deliver(lease, stream);
        if (stream->untaken.count)
            return -1;
    }
    Py_ssize_t length = lease->payload.length + lease->arriving;
    stream->received += length;
    lease->rx_next += HEADER + length;
    lease->carried += length;
    for (int i = 0; i < lease->payload.count; i++) {
        const Piece *piece = &lease->payload.piece[i];
        append(&stream->untaken, piece->owner, piece->memory, piece->length);
    }
    drop(&lease->payload);
    if (lease->arriving) {
        lease->whole += lease->arriving;
        lease->whole_stream = stream;
        lease->arriving = 0;
    }
    return 0;
}

/* The frame is complete.  -1: it is Python's after all. */
int end_frame(Lease *lease)
{
    unsigned char payload[2 * OFFSET] = {0};
    if (lease->kind == DATA)
        return take_data(lease, lease->stream);
    copy_payload(lease, payload);
    if (lease->kind == ACK ? acknowledge(lease, get64(payload)) : take_credit(lease, payload))
        return -1;
    if (lease->kind == CREDIT)
        lease->rx_next += CREDIT_FRAME;
    drop(&lease->payload);
    return 0;
}

/* Leave the frame that is arriving to Python.  -1 with an exception, and something of it is gone. */
int give_up_frame(Lease *lease)
{
    lease->over = 1;
    if (!lease->left && !(lease->left = PyList_New(0)))
        return -1;
    if (!lease->header_length)
        return 0;
    PyObject *header = PyBytes_FromStringAndSize((char *)lease->header, lease->header_length);
    int failed = !header || PyList_Append(lease->left, header) ||
                 append_buffers(lease->left, &lease->payload);
    Py_XDECREF(header);
    lease->header_length = 0;
    drop(&lease->payload);
    lease->lost |= failed && lease->arriving; /* what follows must not be taken for what is gone */
    return failed ? -1 : 0;
}

/* Take in what was received.  -1 with an exception. */
int take_in(Lease *lease, const Piece *piece)
{
    char *at = piece->memory;
    Py_ssize_t length = piece->length;
    while (length && !lease->left) {
        Py_ssize_t count;
        if (lease->header_length < HEADER) {
            count = HEADER - lease->header_length < length ? HEADER - lease->header_length : length;
            memcpy(lease->header + lease->header_length, at, count);
            lease->header_length += count;
            at += count;
            length -= count;
            if (lease->header_length == HEADER && !begin_frame(lease) && give_up_frame(lease))
                return -1;
            continue;
        }
        count = lease->missing < length ? lease->missing : length;
        if (append(&lease->payload, piece->owner, at, count)) {
            if (give_up_frame(lease))
                return -1;
            break;
        }
        at += count;
        length -= count;
        lease->missing -= count;
        if (lease->missing)
            continue;
        if (end_frame(lease)) {
            if (give_up_frame(lease))
                return -1;
        } else {
            lease->header_length = 0;
        }
    }
    Piece rest = {piece->owner, at, length};
    return append_buffer(lease->left, &rest);
}

void deliver_all(Lease *lease)
{
    for (int i = 0; i < lease->stream_count; i++)
        deliver(lease, &lease->streams[i]);
}

/* Take in what was received encrypted, up to a record that is not data.  -1 with an exception. */
static int decrypt(Lease *lease, const Piece *piece)
{
    if (lease->unread)
        return append_buffer(lease->unread, piece); /* as it is */
    Pieces plain = {.count = 0};
    Output output = {.pool = lease->pool, .pieces = &plain};
    Py_ssize_t used;
    int failed = open_records(lease->opener, lease->wrong_tag, piece->memory, piece->length, &used, &output,
                              &lease->odd);
    for (int i = 0; i < plain.count && !failed; i++)
        failed = take_in(lease, &plain.piece[i]);
    drop(&plain);
    if (failed)
        return -1;
    if (!lease->odd.alert && !lease->odd.type)
        return 0;
    lease->over = 1;
    if (!(lease->unread = PyList_New(0)))
        return -1;
    Piece rest = {piece->owner, piece->memory + used, piece->length - used};
    return append_buffer(lease->unread, &rest);
}

/*
 * Take in what is read of the link at once, up to `limit` bytes.  Returns how many there were, and sets `*lost`
 * where something of it is gone.  -1 with an exception.
 */
Py_ssize_t take_pieces(Lease *lease, Py_ssize_t limit, Py_ssize_t again, int *lost)
{
    Pieces pieces = {.count = 0};
    Output output = {.pool = lease->opener ? lease->ciphers : lease->pool, .pieces = &pieces};
    Py_ssize_t total = gather(&output, lease->fd, limit, READ_ROOM, again, &lease->read_end);
    Error error = keep_error();
    for (int i = 0; i < pieces.count && !*lost; i++) /* what was read before it failed, too */
        *lost = lease->opener ? decrypt(lease, &pieces.piece[i]) : take_in(lease, &pieces.piece[i]);
    drop(&pieces);
    return raise_again(error, *lost) ? -1 : total;
}

/* The link has something.  -1 with an exception. */
int from_link(Lease *lease)
{
    int lost = 0, failed;
    if (lease->pages)
        failed = take_pages(lease, &lost) < 0;
    else
        failed = take_pieces(lease, lease->link_turn, READ_AGAIN, &lost) < 0;
    if (lost) {
        lease->hole = 1;
        lease->read_end = EIO; /* the connection cannot go on without what is lost: the next one repeats it */
    }
    if (failed || lease->read_end)
        lease->over = 1;
    Error error = keep_error();
    deliver_all(lease);
    if (raise_again(error, 0) || go_on(lease))
        return -1;
    return lease->pages ? pages_unstore(lease->pages, &lease->forgotten, NULL) : 0;
}
