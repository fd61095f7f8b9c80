/*
The maps from query heads to KV heads for the tests of attention: one of every kind that attention must
support.
*/
#ifndef TEST_HEAD_MAPS_H
#define TEST_HEAD_MAPS_H

enum { MAX_HEADS = 8 };

typedef struct {
    int H, G;
    int kv_of_q[MAX_HEADS];
} head_map_t;

static const head_map_t head_maps[] = {
    {1, 1, {0}},
    {2, 2, {0, 1}},                   // MHA
    {4, 2, {0, 0, 1, 1}},             // GQA
    {3, 1, {0, 0, 0}},                // MQA
    {8, 4, {0, 1, 2, 2, 2, 3, 3, 3}}, // uneven
    {3, 3, {1, 1, 2}},                // first group empty
    {3, 4, {0, 0, 3}},                // middle groups empty
    {4, 3, {0, 1, 1, 1}},             // last group empty
};
enum { NUM_HEAD_MAPS = sizeof(head_maps) / sizeof(head_maps[0]) };

#endif
