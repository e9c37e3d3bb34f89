-- Three queries for the tables written by `python jobs/query.py STORE --parquet tables --document 0`, for DuckDB 1.2 or
-- later. Run in the folder that contains tables/:  duckdb < queries.sql
-- To see what the columns mean:  SELECT decode(key), decode(value) FROM parquet_kv_metadata('tables/load.parquet');

-- 1. Which tokens of an expert have the highest lift? A lift of 4 is the maximum for an expert that gets a quarter of
--    all tokens. The lift of a rare token is mostly chance, so rare tokens are left out.
SELECT data_set, piece, token_id, count, tokens, share, lift
FROM 'tables/token_experts.parquet'
WHERE layer = 3 AND expert = 5 AND tokens >= 20
ORDER BY lift DESC, count DESC, data_set, token_id
LIMIT 10;

-- 2. Between which layers does the first choice say most about the next one? In bits: the mutual information of both
--    choices: the mean of log2(lift), 0 if they are independent. The estimate from counts is slightly too high, by about
--    (E - 1)^2 / (2 T ln 2) bits for E experts and T tokens.
SELECT data_set, layer, next_layer,
       sum(count * log2(nullif(lift, 0))) FILTER (WHERE count > 0) / sum(count) AS bits  -- DuckDB 1.2 filters last
FROM 'tables/transitions.parquet'
WHERE "by" = 'first'
GROUP BY ALL
ORDER BY bits DESC, data_set, layer
LIMIT 10;

-- 3. Which path did the first words of a document take? First choices, layer by layer, and the router's confidence: the
--    first choice's mean weight.
SELECT data_set, position, piece, string_agg(expert::VARCHAR, ' ' ORDER BY layer) AS path, avg(weight) AS mean_weight
FROM 'tables/routes.parquet'
WHERE document = 0 AND k = 0
GROUP BY ALL
ORDER BY data_set, position
LIMIT 50;
